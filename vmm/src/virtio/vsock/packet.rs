//! The header of a packet (virtio 1.2, 5.10.6).
//!
//! It is read from guest memory once, into a plain struct, and never again. The
//! crate `virtio-vsock` would parse it too, but accepts only chains of one or
//! two descriptors, which newer Linux drivers exceed.

use crate::virtio::buffers::Buffers;

/// Size of a header on the wire.
pub const HEADER_BYTES: usize = 44;
/// The only socket type we speak.
pub const TYPE_STREAM: u16 = 1;
/// CID of the host.
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Connect.
    Request = 1,
    /// Connected.
    Response = 2,
    /// No such connection, or its end.
    Reset = 3,
    /// End of one or both directions.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much room the sender has.
    CreditUpdate = 6,
    /// Ask for [`Operation::CreditUpdate`].
    CreditRequest = 7,
}

impl Operation {
    /// The operation of an `op` field, `None` for one that is not known.
    #[must_use]
    pub fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data after the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// See [`Operation`].
    pub op: u16,
    /// Of a shutdown: which directions.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// How many bytes have left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header at the start of a packet; `None` if that is too short.
    #[must_use]
    pub fn read(buffers: &Buffers<'_>) -> Option<Self> {
        let mut bytes = [0; HEADER_BYTES];
        (buffers.read(0, &mut bytes) == HEADER_BYTES).then(|| Self::from_bytes(&bytes))
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = self.src_cid.to_le_bytes().into_iter();
        let fields = fields
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        bytes
    }

    /// The reset that answers this packet: same type, ends swapped.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Operation::Reset as u16,
            ..Self::default()
        }
    }
}

/// Takes fixed-size fields off the front of a header.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        // The fields of `from_bytes` add up to HEADER_BYTES, so there is one.
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else {
            return [0; N];
        };
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_survive_the_round_trip(bytes in prop::array::uniform32(any::<u8>()), tail in prop::array::uniform12(any::<u8>())) {
            let mut header = [0; HEADER_BYTES];
            header[..32].copy_from_slice(&bytes);
            header[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&header).to_bytes(), header);
        }
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            len: 5,
            kind: TYPE_STREAM,
            op: Operation::Data as u16,
            fwd_cnt: 9,
            ..Header::default()
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[24], 5);
        assert_eq!(bytes[28], 1);
        assert_eq!(bytes[30], 5);
        assert_eq!(bytes[40], 9);
        for op in 1..=7 {
            assert_eq!(Operation::from_wire(op).map(|known| known as u16), Some(op));
        }
        assert_eq!(Operation::from_wire(0), None);
        assert_eq!(Operation::from_wire(8), None);
    }
}
