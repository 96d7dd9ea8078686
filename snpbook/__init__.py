"""snpbook: an AMD EPYC server with SEV-SNP that fits in a notebook.

Each party of confidential computing is a package: silicon, secure processor, host, guest, relying party. Importing
`snpbook` loads none of them; `snpbook.system` joins them to one machine, `snpbook.labs` is what a notebook imports.
"""

__version__ = "0.1.0"
