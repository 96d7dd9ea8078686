"""The host software: kernel bring-up, the CCP driver, KVM, memory back ends and a small VMM.

It is in control of the machine and outside of the guest's trust: it owns scheduling, page tables and the RMP's updates.
It meets the firmware only through mailbox registers, and a guest only through VM exits and shared pages.
"""
