"""Image-text pairs: COYO, img2dataset."""
