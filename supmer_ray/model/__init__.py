"""The frozen language model, the soft prompt before it and the regularizer of its gradient.

Tensors in, tensors out: nothing here knows Ray or where text comes from, nor a file layout of this project, save that
`backbone` asks the package `embedded` for the folder behind that name. `backbone` loads and calls the frozen
encoder-decoder on rows without padding (`packed`), by the forward that suits its family: `t5`, `bert`, or `library` for
every other. On a GPU the first two compute with the kernels of `fused`. `prompted` runs it with one soft prompt for
each example, `regularizer` is ψ_φ.
"""
