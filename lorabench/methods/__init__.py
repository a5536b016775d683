"""Methods: from hyper-parameters to what one slice trains. One file each, found by its name."""
