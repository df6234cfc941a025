"""Models of other projects: weights of the Llama architecture in and out, and memories added to them."""
