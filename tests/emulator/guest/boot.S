/* Boot sector of the emulated machine's disk.  Reads the memory image that follows it on the disk
 * to TABLES (page tables, boot_params, command line, uncompressed Linux kernel, initramfs; see
 * bochs.py), switches to 64-bit mode and jumps to the kernel, following Linux's 64-bit boot
 * protocol.  bochs.py defines TABLES, PARAMS, ENTRY and SECTORS, the image's size, a multiple of 256.
 */
    .code16
    .globl _start
_start:
    cli
    ljmp $0, $1f
1:  xor %ax, %ax
    mov %ax, %ds
    in $0x92, %al /* A20 */
    or $2, %al
    out %al, $0x92
    lgdtl gdt_pointer
    mov %cr0, %eax
    and $0x9FFFFFFF, %eax /* caches on, as Linux expects */
    or $1, %al
    mov %eax, %cr0
    ljmpl $0x08, $protected_mode

    .code32
protected_mode:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    cld
    mov $0x3F6, %dx
    mov $2, %al /* no interrupts from the disk: it is polled */
    out %al, %dx
    mov $TABLES, %edi
    mov $1, %ebx /* sector */
read_256_sectors:
    mov $0x1F7, %dx
1:  in %dx, %al
    test $0x80, %al /* busy */
    jnz 1b
    mov $0x1F2, %dx
    xor %al, %al /* 256 sectors */
    out %al, %dx
    mov %ebx, %eax /* the sector's number goes to ports 1F3 to 1F6, lowest byte first */
    mov $3, %ecx
2:  inc %edx
    out %al, %dx
    shr $8, %eax
    loop 2b
    inc %edx
    or $0xE0, %al /* LBA, first drive */
    out %al, %dx
    inc %edx
    mov $0x20, %al /* READ SECTORS */
    out %al, %dx
    mov $256, %ebp
read_sector:
    mov $0x1F7, %dx
3:  in %dx, %al
    and $0x88, %al
    cmp $0x08, %al /* not busy and data are ready */
    jne 3b
    mov $0x1F0, %dx
    mov $256, %ecx
    rep insw
    dec %ebp
    jnz read_sector
    add $256, %ebx
    cmp $SECTORS, %ebx
    jb read_256_sectors

    mov $0x20, %eax /* CR4.PAE */
    mov %eax, %cr4
    mov $TABLES, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax /* paging */
    mov %eax, %cr0
    ljmp $0x10, $long_mode

    .code64
long_mode:
    mov $PARAMS, %esi
    mov $ENTRY, %eax
    jmp *%rax

    .balign 8
gdt: /* the boot protocol wants 0x10 for code and 0x18 for data; 0x08 is 32-bit code */
    .quad 0, 0x00CF9A000000FFFF, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .org 510
    .word 0xAA55
