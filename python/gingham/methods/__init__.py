"""One folder per paper: the network, the objective, the recipe, and a page that says what was confirmed."""
