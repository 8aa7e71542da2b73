//! Code of a few dozen instructions for guests that drive one device, and where they have
//! things.

use super::out;
use crate::layout::{self, ECAM_BUS_SIZE, ECAM_START, WINDOW32_PORTS};

pub const PORT_CONFIG: u64 = ECAM_START + (1 << 15);
pub const CONFIG: u64 = ECAM_START + ECAM_BUS_SIZE;
pub const BAR: u64 = WINDOW32_PORTS;
pub const DMA_SOURCE: u64 = BAR + 0x80;
pub const DMA_TARGET: u64 = BAR + 0x88;
pub const DMA_COUNT: u64 = BAR + 0x90;
pub const DMA_COMMAND: u64 = BAR + 0x98;
/// DMA command: begin; from the device to memory.
pub const START: u32 = 1;
pub const TO_MEMORY: u32 = 2;
pub const GUEST_SIZE: u32 = 32 << 20;
/// Where the guest has its page tables, and behind its memory what they lead to elsewhere.
pub const DIRECTORY: u32 = 0x22_0000;
pub const POINTERS: u32 = 0x22_1000;
pub const LARGE_PAGE: u32 = 2 << 20;
pub const HIGH: u32 = GUEST_SIZE;

pub const VECTOR: u32 = 0x41;
/// Vector of non-maskable interrupts.
const NMI: u32 = 2;
pub const APIC_SPURIOUS: u64 = 0xf0;

/// Where a guest with interrupts has its descriptor tables, what tells the processor of them,
/// its handler, what that counts, and its stack.
const GDT: u32 = 0x24_0000;
const IDT: u32 = 0x24_1000;
const TABLES: u32 = 0x24_2000;
const HANDLER: u32 = 0x24_3000;
pub const COUNT: u64 = 0x24_4000;
const STACK: u32 = 0x25_0000;
/// Registers of the local APIC and the I/O APIC.
const APIC_END: u32 = layout::LAPIC + 0xb0;
const IOAPIC_WINDOW: u64 = layout::IOAPIC as u64 + 0x10;
/// A redirection entry for an interrupt that is a level.
const LEVEL: u32 = 1 << 15;
/// Of a serial port: to be told, and telling, that it has nothing to send.
const SENT: u8 = 2;

/// 32-bit code without paging: memory is where it is.
pub struct Code(Vec<u8>);

impl Code {
    /// Begins with what a failed expectation jumps to.
    pub fn new() -> Self {
        let fail = out(layout::PORT_RESET, 1);
        let mut code = vec![0xeb, u8::try_from(fail.len()).unwrap()];
        code.extend(fail);
        Self(code)
    }

    pub fn bytes(mut self, opcode: &[u8], operands: &[u32]) -> Self {
        self.0.extend(opcode);
        self.0
            .extend(operands.iter().flat_map(|word| word.to_le_bytes()));
        self
    }

    /// `mov dword [address], value`
    pub fn store(self, address: u64, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05], &[u32::try_from(address).unwrap(), value])
    }

    /// `cmp dword [address], value; jne fail`
    pub fn expect(self, address: u64, value: u32) -> Self {
        self.compare(address, value, 0x85)
    }

    /// `cmp dword [address], value; je fail`
    pub fn expect_not(self, address: u64, value: u32) -> Self {
        self.compare(address, value, 0x84)
    }

    fn compare(self, address: u64, value: u32, jump: u8) -> Self {
        let code = self.bytes(&[0x81, 0x3d], &[u32::try_from(address).unwrap(), value]);
        code.or_fail(jump)
    }

    /// Jumps back over everything but the first jump.
    fn or_fail(self, jump: u8) -> Self {
        let distance = i32::try_from(self.0.len() + 6 - 2).unwrap();
        self.bytes(&[0x0f, jump], &[(-distance).cast_unsigned()])
    }

    /// Until the bits are clear: `test dword [address], bits; jnz` to itself.
    pub fn wait_clear(self, address: u64, bits: u32) -> Self {
        let code = self.bytes(&[0xf7, 0x05], &[u32::try_from(address).unwrap(), bits]);
        code.bytes(&[0x0f, 0x85], &[(-16i32).cast_unsigned()])
    }

    /// Until one of the bits is set: `test dword [address], bits; jz` to itself.
    pub fn wait_set(self, address: u64, bits: u32) -> Self {
        let code = self.bytes(&[0xf7, 0x05], &[u32::try_from(address).unwrap(), bits]);
        code.bytes(&[0x0f, 0x84], &[(-16i32).cast_unsigned()])
    }

    /// I/O and memory space and bus mastering, of the port and of the device.
    pub fn enable(self) -> Self {
        self.store(PORT_CONFIG + 4, 7).store(CONFIG + 4, 7)
    }

    /// Four bytes by DMA.
    pub fn dma(self, from: u32, to: u32, command: u32) -> Self {
        self.store(DMA_SOURCE, from)
            .store(DMA_TARGET, to)
            .store(DMA_COUNT, 4)
            .store(DMA_COMMAND, START | command)
            .wait_clear(DMA_COMMAND, START)
    }

    /// Turns paging on, with 2 MiB pages and addresses above 4 GiB (Intel SDM volume 3, 4.4):
    /// memory is where it was, and from [`HIGH`] on come pages at `addresses`.
    pub fn paging(self, addresses: &[u64]) -> Self {
        let memory = (0..GUEST_SIZE).step_by(LARGE_PAGE as usize).map(u64::from);
        let pages = memory.chain(addresses.iter().copied());
        let begin = self.store(POINTERS.into(), DIRECTORY | 1);
        let code = (0u64..).zip(pages).fold(begin, |code, (index, page)| {
            // Present, writable, large.
            let [low, high] = [page | 0x83, page >> 32].map(|word| word & 0xffff_ffff);
            let at = u64::from(DIRECTORY) + index * 8;
            code.store(at, u32::try_from(low).unwrap())
                .store(at + 4, u32::try_from(high).unwrap())
        });
        // cr3 = POINTERS; cr4 |= PAE; cr0 |= PG, each by way of eax.
        code.bytes(&[0xb8], &[POINTERS])
            .bytes(&[0x0f, 0x22, 0xd8], &[])
            .bytes(&[0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0], &[])
            .bytes(&[0x0f, 0x20, 0xc0, 0x0d], &[1 << 31])
            .bytes(&[0x0f, 0x22, 0xc0], &[])
    }

    pub fn power_off(mut self) -> Vec<u8> {
        self.0.extend(out(layout::PORT_SLEEP_CONTROL, 0x34));
        self.0
    }

    /// Until a word is `value` or more: `cmp dword [address], value; jb` to itself.
    pub fn wait_for(self, address: u64, value: u32) -> Self {
        let code = self.bytes(&[0x81, 0x3d], &[u32::try_from(address).unwrap(), value]);
        code.bytes(&[0x0f, 0x82], &[(-16i32).cast_unsigned()])
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn output(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee], &[])
    }

    /// `mov dx, port; in al, dx; cmp al, value; jne fail`
    pub fn expect_port(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xec, 0x3c, value], &[])
            .or_fail(0x85)
    }

    /// Turns interrupts on, with a handler of a line that ends the interrupt and counts at
    /// [`COUNT`].
    pub fn serve(self, line: u32) -> Self {
        let handler = Self(Vec::new()).store(APIC_END.into(), 0).count();
        self.serve_with(line, handler)
    }

    /// The same for a device that says at `status` what it wants, and is given that back at
    /// `acknowledge`: it is what is counted, so that an interrupt for nothing is not. QEMU
    /// (11.1) makes two of one where it has to leave the processor's loop right after a
    /// VMRUN that injects it: `helper_vmrun` leaves `exception_index` behind.
    pub fn serve_device(self, line: u32, status: u64, acknowledge: u64) -> Self {
        let [status, acknowledge] = [status, acknowledge].map(|at| u32::try_from(at).unwrap());
        // push eax; mov eax, [status]; mov [acknowledge], eax; ...; add [COUNT], eax; pop eax
        let handler = Self(vec![0x50])
            .bytes(&[0xa1], &[status])
            .bytes(&[0xa3], &[acknowledge])
            .store(APIC_END.into(), 0)
            .bytes(&[0x01, 0x05], &[u32::try_from(COUNT).unwrap()])
            .bytes(&[0x58], &[]);
        self.serve_with(line, handler)
    }

    /// The same for a serial port, which is to say when it has nothing to send: each time that it does
    /// is counted, and the port is told to say it no more. Two registers of the 16550, from `port` on: what
    /// it interrupts for, and what for it does.
    pub fn serve_serial(self, line: u32, port: u16) -> Self {
        let [enabled, pending] = [1, 2].map(|register| (port + register).to_le_bytes());
        // push eax; push edx; xor eax, eax; mov dx, pending; in al, dx; and eax, SENT;
        // shr eax, 1; add [COUNT], eax; mov dx, enabled; mov al, 0; out dx, al; ...; pop edx; pop eax
        let handler = Self(vec![0x50, 0x52, 0x31, 0xc0])
            .bytes(&[0x66, 0xba, pending[0], pending[1], 0xec], &[])
            .bytes(&[0x83, 0xe0, SENT, 0xd1, 0xe8], &[])
            .bytes(&[0x01, 0x05], &[u32::try_from(COUNT).unwrap()])
            .bytes(&[0x66, 0xba, enabled[0], enabled[1], 0xb0, 0, 0xee], &[])
            .store(APIC_END.into(), 0)
            .bytes(&[0x5a, 0x58], &[]);
        self.serve_with(line, handler)
    }

    /// Has a serial port say that it has nothing to send until it has said so `count` times.
    pub fn ask_serial(self, port: u16, count: u32) -> Self {
        // jb to where it asks
        self.output(port + 1, SENT)
            .bytes(&[0x81, 0x3d], &[u32::try_from(COUNT).unwrap(), count])
            .bytes(&[0x0f, 0x82], &[(-23i32).cast_unsigned()])
    }

    fn serve_with(self, line: u32, handler: Self) -> Self {
        self.handle(VECTOR, handler)
            .store(u64::from(layout::LAPIC) + APIC_SPURIOUS, 0x1ff)
            .redirect(0x11 + 2 * line, 0)
            .redirect(0x10 + 2 * line, VECTOR | LEVEL)
            .bytes(&[0xfb], &[])
    }

    /// With a handler of non-maskable interrupts, which stores what a port says behind
    /// [`COUNT`] and adds one to that.
    pub fn take_nmi(self, port: u8) -> Self {
        let reason = u32::try_from(COUNT + 4).unwrap();
        // xor eax, eax; in al, port; mov [reason], eax
        let handler = Self(vec![0x31, 0xc0, 0xe4, port]).bytes(&[0xa3], &[reason]);
        self.handle(NMI, handler.count())
    }

    /// `inc dword [COUNT]`
    fn count(self) -> Self {
        self.bytes(&[0xff, 0x05], &[u32::try_from(COUNT).unwrap()])
    }

    /// With a handler of a vector.
    fn handle(self, vector: u32, handler: Self) -> Self {
        // sti; ret 8, over the saved segment and flags. Not iret, which KVM does not know where
        // it emulates all of a guest.
        let handler = handler.bytes(&[0xfb, 0xc2, 8, 0], &[]);
        let words = handler.0.chunks(4).map(|chunk| {
            let mut word = [0x90; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        });
        let (gdt, idt, tables) = (u64::from(GDT), u64::from(IDT), u64::from(TABLES));
        let gate = idt + u64::from(vector) * 8;
        let code = (u64::from(HANDLER)..)
            .step_by(4)
            .zip(words)
            .fold(self, |code, (at, word)| code.store(at, word));
        // Flat segments at 8 and 16, as the guest has begun with; an interrupt gate.
        code.store(gdt + 8, 0xffff)
            .store(gdt + 12, 0x00cf_9b00)
            .store(gdt + 16, 0xffff)
            .store(gdt + 20, 0x00cf_9300)
            .store(gate, 8 << 16 | HANDLER & 0xffff)
            .store(gate + 4, HANDLER & 0xffff_0000 | 0x8e00)
            .store(tables, GDT << 16 | 23)
            .store(tables + 4, GDT >> 16)
            .store(tables + 8, IDT << 16 | (VECTOR * 8 + 7))
            .store(tables + 12, IDT >> 16)
            // lgdt, lidt, esp = STACK
            .bytes(&[0x0f, 0x01, 0x15], &[TABLES])
            .bytes(&[0x0f, 0x01, 0x1d], &[TABLES + 8])
            .bytes(&[0xbc], &[STACK])
    }

    /// Writes a register of the I/O APIC.
    fn redirect(self, register: u32, value: u32) -> Self {
        self.store(layout::IOAPIC.into(), register)
            .store(IOAPIC_WINDOW, value)
    }
}
