"""Ways into other people's engines; each needs its engine installed, and nobody here imports them."""
