"""The version of dinokit: written here, read by the build, the package and the model folders."""

__version__ = "0.1.0"
