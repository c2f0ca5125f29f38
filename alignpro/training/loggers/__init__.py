"""Where metrics go: JSON Lines files, TensorBoard and Weights & Biases, and the logger that writes to all of them."""
