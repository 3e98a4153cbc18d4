"""A diagonal of fimlib in other libraries, one file for each; they are installed by hand."""
