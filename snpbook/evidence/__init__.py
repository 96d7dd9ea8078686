"""Reports, certificate chains and revocation lists made to order, good ones and ones with a named defect.

They are a conformance kit for verifiers, ours and other people's: each piece says what a correct verifier answers.
"""
