"""The passes, in the order in which they run, with the promise each makes.

normalize_adds  every value stays; every addition of tensors is aten.add.Tensor
join_slices     every value stays; what was cut in two and put together again is one value
find_stream     the graph stays; the adds of the residual streams are told from all others, each with a reason
relax_views     every value stays; what a read or another device makes may be viewed whatever its layout
plan_blocks     the graph stays; every update is in one block, every state that is read has one read
insert_reads    at zero queries every output stays; no original add of a stream is left
schedule_reads  every output stays; reads that share sources mix them once, where that moves fewer bytes
fuse_reads      every output stays, to rounding; the add before a merge and the norm after it run in its pass
relax_checks    every output stays; autocast may lower what the capture found in float32
"""
