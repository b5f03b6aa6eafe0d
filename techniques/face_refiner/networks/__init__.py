"""Generators and discriminators that load published weights unchanged."""
