"""The frozen language model, the soft prompt before it and the regularizer of its gradient.

Tensors in, tensors out: nothing here knows Ray, a file layout of this project, or where text comes
from. `backbone` loads and calls the frozen encoder-decoder, `prompted` runs it with one soft prompt
for each example, `regularizer` is ψ_φ.
"""
