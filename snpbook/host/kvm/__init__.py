"""KVM with its SVM module: /dev/kvm, virtual machines, virtual CPUs, and the memory behind them.

`device` is the module and /dev/kvm, `vm` and `vcpu` the files behind its descriptors; `memslots`, `attributes` and
`guest_memfd` say what memory a guest has, `mmu` and `fault` map it, `sev` and its neighbours launch encrypted guests,
`run` and `ghcb` serve their exits.
"""
