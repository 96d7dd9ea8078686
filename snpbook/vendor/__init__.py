"""AMD as a party: root keys, the provisioning of chips, and the service that publishes their certificates.

The keys are toys, fixed and public by design, in chains of the exact shape and names of the real ones.
AMD knows each chip's secrets, so this package may import `firmware.keys`, and nothing else of the model.
"""
