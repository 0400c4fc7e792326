"""Loading, adapting, merging and saving models."""

from posttrain.run.libraries import load_libraries

load_libraries("torch")
