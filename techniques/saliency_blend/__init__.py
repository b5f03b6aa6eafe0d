"""SaliencyNoiseBlend (MagicFusion): several models blended in one sampling step. Start with blend.py."""
