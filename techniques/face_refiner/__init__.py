"""FaceRefiner: a generator that restores face detail lost by distilled models. Start with refine.py."""
