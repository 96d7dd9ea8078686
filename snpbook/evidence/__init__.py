"""Reports, certificate chains and revocation lists made to order, good ones and ones with a named defect.

They are a conformance kit for verifiers, ours and other people's. The package will hold the makers and the list of
defects with the verdict that each must meet; it is empty so far.
"""
