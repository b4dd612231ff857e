"""The bi-level optimization of the soft prompt θ and the regularizer ψ_φ.

`step` computes the meta-gradients of some tasks, `reduce` adds them up over the workers, `curriculum` decides how far
a query set is mixed with its partner's, `state` is everything that a run learns and how it is updated, saved and
resumed, and `learner` puts these together to one worker's meta-step (torch alone: no Ray). `loop` is what a worker
does from its start to its end, `run` what its driver and it must agree on, `record` what a run leaves of its steps, and
`restarts` tells the user there when workers fail and are started again.
"""
