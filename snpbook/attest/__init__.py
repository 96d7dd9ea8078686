"""The relying party: is a report genuine (`verify`), is it wanted (`appraise`), what should it measure (`measure`)?

It computes the expected measurement from the guest's image alone and never looks into the model. It imports `spec`
and cryptography only, so the same code serves reports of real machines. Each module is its own public face:
`parse`, `certs`, `roots` and `chain` lead up to `verify`; importing the package loads none of them.
"""
