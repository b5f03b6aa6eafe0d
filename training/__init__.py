"""Pure code that several trainings share: the loop, metrics, random generators."""
