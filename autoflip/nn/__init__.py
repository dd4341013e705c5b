"""Drop-in sparse layers, and the way from a plain model to a sparse or a compact one and back."""
