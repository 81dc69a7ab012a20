"""Stage one: teachers label crops into a store."""
