"""The VMM: a process that builds guests as QEMU does and serves their exits.

`options` says what a guest is made of and `command_line` reads it from a QEMU command line; `guest` drives /dev/kvm and
/dev/sev through the process's descriptors, `launch` is the encrypted launch, `exits` the loop around KVM_RUN.
"""
