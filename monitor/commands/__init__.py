"""Commands of the command line, one module each; `midstream.cli` puts them together."""
