"""One trainer per shape of data; the loss, advantage and reward functions are passed in."""

from posttrain.run.libraries import load_libraries

load_libraries("torch", "transformers.trainer")
