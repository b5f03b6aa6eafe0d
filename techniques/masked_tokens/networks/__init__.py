"""The U-ViT and the VQ-GAN of aMUSEd; they load published weights unchanged."""
