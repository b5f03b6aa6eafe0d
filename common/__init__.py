"""Pure code that several techniques share: loading of weights, checks for non-finite values, image sheets."""
