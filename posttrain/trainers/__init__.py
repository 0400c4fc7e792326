"""One trainer per shape of data; the loss, advantage and reward functions are passed in."""
