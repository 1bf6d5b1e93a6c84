"""Linear layers: the products, and on a GPU their gradients with that of the bias."""
