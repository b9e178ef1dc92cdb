"""From a recipe to the things it names."""
