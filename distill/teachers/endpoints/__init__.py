"""Language models behind an address, which answer over HTTP."""
