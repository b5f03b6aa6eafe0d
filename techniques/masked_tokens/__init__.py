"""MaskedTokenSampler (aMUSEd): images by parallel decoding of masked tokens. Start with decode.py."""
