"""The recipes, YAML files. A package only so that an installed wheel holds them."""
