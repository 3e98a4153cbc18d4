"""Ways to the derivatives of a network, one file each; ``choose`` picks one and confirms it."""
