//! Byte buffers for packed weights: aligned to cache lines, and in huge pages where Linux has them.
//!
//! Reading weights is what decoding waits for, and with 4 KB pages a quarter of the bandwidth goes to
//! page walks. Huge pages are only advised for memory of our own, not for a mapped file.

use core::ptr::NonNull;

use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

const ALIGN: usize = 64;
#[cfg(all(feature = "std", target_os = "linux"))]
const HUGE_PAGE: usize = 2 << 20;

/// A zeroed, 64-byte-aligned block of bytes with a fixed length.
#[derive(Debug)]
pub(crate) struct Buffer {
    data: NonNull<u8>,
    len: usize,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    Empty,
    Heap(Layout),
    /// Start and length of the mapping that `data` lies in.
    #[cfg(all(feature = "std", target_os = "linux"))]
    Mapped(NonNull<u8>, usize),
}

// SAFETY: the buffer owns its bytes like a `Box<[u8]>`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes. Ends the process when there is no memory, as `Vec` does.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { data: NonNull::dangling(), len, origin: Origin::Empty };
        }
        #[cfg(all(feature = "std", target_os = "linux"))]
        if len >= HUGE_PAGE / 2
            && let Some(buffer) = Self::mapped(len)
        {
            return buffer;
        }
        let layout = Layout::from_size_align(len, ALIGN).expect("a length that fits in memory");
        // SAFETY: the layout is not empty.
        let data = unsafe { alloc_zeroed(layout) };
        let Some(data) = NonNull::new(data) else { handle_alloc_error(layout) };
        Self { data, len, origin: Origin::Heap(layout) }
    }

    /// Pages straight from the system: they are zero without being touched, so the advice comes first.
    #[cfg(all(feature = "std", target_os = "linux"))]
    fn mapped(len: usize) -> Option<Self> {
        let rounded = len.checked_next_multiple_of(HUGE_PAGE)?;
        let size = rounded.checked_add(HUGE_PAGE)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh private mapping; no existing memory is affected.
        let start = unsafe { libc::mmap(core::ptr::null_mut(), size, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start.cast::<u8>())?;
        // SAFETY: at most HUGE_PAGE - 1 bytes forward, and the mapping is HUGE_PAGE longer than `len`.
        let data = unsafe { start.add(start.align_offset(HUGE_PAGE)) };
        // SAFETY: advice on our own pages; a refusal costs speed only.
        unsafe { libc::madvise(data.as_ptr().cast(), rounded, libc::MADV_HUGEPAGE) };
        Some(Self { data, len, origin: Origin::Mapped(start, size) })
    }

    /// Bytes `at..at + len`, for threads that each read and write parts of their own. Panics outside of the buffer.
    ///
    /// # Safety
    /// Nothing else refers to these bytes while the result lives.
    #[allow(clippy::mut_from_ref)]
    #[cfg(feature = "std")]
    pub(crate) unsafe fn part_mut(&self, at: usize, len: usize) -> &mut [u8] {
        assert!(at <= self.len && len <= self.len - at, "part outside of the buffer");
        // SAFETY: initialised bytes owned by this buffer, reached by its pointer; the caller rules out overlap.
        unsafe { core::slice::from_raw_parts_mut(self.data.as_ptr().add(at), len) }
    }

    /// Bytes `at..at + len`, while other threads may write other parts. Panics outside of the buffer.
    ///
    /// # Safety
    /// Nobody writes these bytes while the result lives.
    #[cfg(feature = "std")]
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &[u8] {
        assert!(at <= self.len && len <= self.len - at, "part outside of the buffer");
        // SAFETY: as in `part_mut`.
        unsafe { core::slice::from_raw_parts(self.data.as_ptr().add(at), len) }
    }
}

/// Asks for huge pages for the whole pages inside `memory`, which pays where much is read again and again. A hint: only
/// memory not touched yet gets them, and only where the system has them.
#[cfg(feature = "std")]
pub fn advise_huge_pages<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    if size_of_val(memory) >= HUGE_PAGE {
        const PAGE: usize = 1 << 16; // At least the system's own.
        let bytes = memory.as_mut_ptr().cast::<u8>();
        let first = bytes.align_offset(PAGE);
        let len = (size_of_val(memory) - first) / PAGE * PAGE;
        // SAFETY: whole pages inside memory that the caller holds exclusively, and advice that changes no contents; a
        // refusal costs speed only.
        unsafe { libc::madvise(bytes.add(first).cast(), len, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.origin {
            Origin::Empty => {}
            // SAFETY: allocated with this layout, freed once.
            Origin::Heap(layout) => unsafe { dealloc(self.data.as_ptr(), layout) },
            #[cfg(all(feature = "std", target_os = "linux"))]
            Origin::Mapped(start, size) => {
                // SAFETY: mapped with this start and size, unmapped once.
                unsafe { libc::munmap(start.as_ptr().cast(), size) };
            }
        }
    }
}

impl core::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes (zeroed) owned by this buffer.
        unsafe { core::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl core::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_writable_at_any_size() {
        for len in [0, 1, 63, 4096, (2 << 20) - 1, 2 << 20, (6 << 20) + 5] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&b| b == 0));
            buffer.fill(7);
            assert!(buffer.iter().all(|&b| b == 7));
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(ALIGN));
        }
    }
}
