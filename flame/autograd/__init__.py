"""The tape and the backward pass, over whatever the ops work on."""
