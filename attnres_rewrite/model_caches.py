"""Let torch see into the key-value cache that a Hugging Face model returns.

A model called without `use_cache=False` returns a DynamicCache, which torch.export takes only when it is
registered as a pytree. transformers has the registration, and leaves the call to its user.
"""

import importlib
from typing import Any

_HOME = "transformers.integrations.executorch"


def register_caches(model: object) -> None:
    """Register the cache class of transformers when `model` is one of its models; nothing otherwise."""
    if any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        register_dynamic_cache()


def register_dynamic_cache() -> None:
    """Register DynamicCache; a second call changes nothing."""
    try:
        helpers: Any = importlib.import_module(_HOME)
    except ImportError:
        # a transformers without the helper: export says what it misses
        return
    register = getattr(helpers, "register_dynamic_cache_export_support", None)
    if register is not None:
        register()
