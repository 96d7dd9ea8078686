"""The command line: `snpbook` and its subcommands, one module each, loaded when asked for.

Each command turns words into calls of the packages below and their refusals into the exit codes of `errors`.
Here, and in the vendor's key service, the outside world begins: files, sockets, terminals.
"""
