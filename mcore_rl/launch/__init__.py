"""Starting worker processes and calling methods on all of them."""
