"""The bi-level optimization of the soft prompt θ and the regularizer ψ_φ.

`step` computes the meta-gradients of some tasks (pure torch, no Ray, no files), `curriculum` decides
how far a query set is mixed with its partner's, `state` is everything that a run learns and how it is
updated, saved and resumed, and `loop` is what each Ray Train worker runs.
"""
