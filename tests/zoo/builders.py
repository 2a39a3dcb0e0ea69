"""The zoo: every real model that a rewrite is tried on.

hand_counted()  named models whose updates were counted by hand
sweep()         every causal, masked, sequence-to-sequence and image-classification class of transformers
timm_sweep()    varied vision models of timm
"""

from tests.zoo.diffusers_models import image_denoisers, video_and_audio_denoisers
from tests.zoo.hand_counted import decoders, encoders, refused
from tests.zoo.hand_written import hand_written
from tests.zoo.spec import Spec
from tests.zoo.sweep import sweep
from tests.zoo.timm_models import hand_counted_timm, timm_sweep

__all__ = ["Spec", "everything", "hand_counted", "sweep", "timm_sweep"]


def hand_counted() -> tuple[Spec, ...]:
    """Return the models whose updates were counted by hand; their names are short."""
    return (*decoders(), *encoders(), *refused(), *hand_written(), *hand_counted_timm(), *denoisers())


def denoisers() -> tuple[Spec, ...]:
    """Return the models of diffusers."""
    return (*image_denoisers(), *video_and_audio_denoisers())


def everything() -> tuple[Spec, ...]:
    """Return every entry of the zoo; names are unique."""
    return (*hand_counted(), *sweep(), *timm_sweep())
