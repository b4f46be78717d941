"""What the verbs do: from options to the library's functions, and from their results to what is printed."""
