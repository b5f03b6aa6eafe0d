"""Pure code that several techniques share: weights of networks, sheets of images."""
