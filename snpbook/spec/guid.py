"""GUIDs of the tables that firmware images, kernels and certificate blobs carry.

Images and hash tables store a GUID in EFI's mixed-endian form (`bytes_le`); certificate tables
store it in text order. Sources: edk2 OvmfPkg, QEMU target/i386/sev.c, the SNP ABI's companion tools.
"""

from uuid import UUID

OVMF_FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
SEV_ES_RESET_BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SEV_METADATA = UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
HASH_TABLE_AREA = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
SECRET_AREA = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
SVSM_INFO = UUID("a789a612-0597-4c4b-a49f-cbb1fe9d1ddd")

HASH_TABLE = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
HASH_CMDLINE = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
HASH_INITRD = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
HASH_KERNEL = UUID("4de79437-abd2-427f-b835-d5b172d2045b")

CERT_VCEK = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
CERT_VLEK = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
CERT_ASK = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
CERT_ARK = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CERT_CRL = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")
CC_BLOB = UUID("067b1f5f-cf26-44c5-8554-93d777912d42")
"""The entry of EFI's configuration tables that names the CC blob."""
