"""The parts of fastconv.fuse.

trace      one module's forward as torch.fx graphs, children as leaves; or the reason why there is none
effects    which values of a graph may share storage, and which nodes write in place
patterns   the groups in a graph: convolution, batch norm, addition, activation, pooling
analysis   the three above over a whole model
rewrite    a graph rewritten around its groups
defer      which groups' results the backward recomputes instead of keeping
plan       the rewritten graphs of a container, compiled: what it runs
runtime    the functions that the rewritten graphs call, each with its unfused twin
module     the fused container: class, structural copy, pickling
kept       what a training step keeps for its backward, group by group
report     what was fused, what was left and why
"""
