"""The base model, the shared-base mixture, its losses, and the one loader of every run."""
