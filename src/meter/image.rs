//! What an image costs in tokens, by the formulas of OpenAI's vision guide, and how large a `data:` image is.

/// The most that an image can cost with any model known: gpt-4o-mini's eight tiles.
pub const IMAGE_TOKENS_MAX: u64 = GPT_4O_MINI.max();

/// How a family of models prices an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImagePrice {
    /// A base, and so much for each tile of 512 pixels square.
    Tiles { base: u64, tile: u64 },
    /// Patches of 32 pixels square, at most [`PATCHES_MAX`], times so many hundredths.
    Patches { percent: u64 },
}

use ImagePrice::{Patches, Tiles};

const GPT_4O_MINI: ImagePrice = Tiles { base: 2833, tile: 5667 };
/// The price for a model that is not listed; its count is an estimate.
const USUAL: ImagePrice = Tiles { base: 85, tile: 170 };
/// An image is first fitted into 2048 pixels square, then its shorter side to 768: at most 4 x 2 tiles.
const TILES_MAX: u64 = 8;
const PATCHES_MAX: u64 = 1536;

/// By the beginning of a model's name; the first that fits counts, so longer ones stand first.
/// Source: platform.openai.com/docs/guides/images-vision, "Calculating costs".
const PRICES: &[(&str, ImagePrice)] = &[
    ("gpt-4o-mini", GPT_4O_MINI),
    ("gpt-4o", USUAL),
    ("chatgpt-4o", USUAL),
    ("gpt-4.1-mini", Patches { percent: 162 }),
    ("gpt-4.1-nano", Patches { percent: 246 }),
    ("gpt-4.1", USUAL),
    ("gpt-4.5", USUAL),
    ("gpt-4-turbo", USUAL),
    ("gpt-5-mini", Patches { percent: 162 }),
    ("gpt-5-nano", Patches { percent: 246 }),
    ("gpt-5-", Tiles { base: 70, tile: 140 }),
    ("o4-mini", Patches { percent: 172 }),
    ("o1", Tiles { base: 75, tile: 150 }),
    ("o3", Tiles { base: 75, tile: 150 }),
    ("computer-use-preview", Tiles { base: 65, tile: 129 }),
];

/// The most that an image can cost with this model; [`IMAGE_TOKENS_MAX`] where its formula is not known.
pub fn image_tokens_max(model: &str) -> u64 {
    ImagePrice::of_model(model).map_or(IMAGE_TOKENS_MAX, ImagePrice::max)
}

impl ImagePrice {
    pub(super) fn of_model(model: &str) -> Option<Self> {
        if model == "gpt-5" {
            return Some(Tiles { base: 70, tile: 140 });
        }
        PRICES.iter().find(|(name, _)| model.starts_with(name)).map(|(_, price)| *price)
    }

    pub(super) const fn usual() -> Self {
        USUAL
    }

    /// The tokens of an image of `width` x `height` pixels in high detail.
    pub(super) fn tokens(self, width: u32, height: u32) -> u64 {
        let (width, height) = (u64::from(width.max(1)), u64::from(height.max(1)));
        match self {
            Tiles { base, tile } => base + tile * tiles(width, height),
            Patches { percent } => (patches(width, height) * percent).div_ceil(100),
        }
    }

    /// The tokens of an image in low detail. The guide knows none for models that count patches: they pay in full.
    pub(super) const fn low(self) -> Option<u64> {
        match self {
            Tiles { base, .. } => Some(base),
            Patches { .. } => None,
        }
    }

    pub(super) const fn max(self) -> u64 {
        match self {
            Tiles { base, tile } => base + tile * TILES_MAX,
            Patches { percent } => (PATCHES_MAX * percent).div_ceil(100),
        }
    }
}

fn tiles(width: u64, height: u64) -> u64 {
    let (mut long, mut short) = (width.max(height), width.min(height));
    if long > 2048 {
        (long, short) = (2048, (short * 2048 / long).max(1));
    }
    if short > 768 {
        (long, short) = (long * 768 / short, 768);
    }
    long.div_ceil(512) * short.div_ceil(512)
}

fn patches(width: u64, height: u64) -> u64 {
    let all = width.div_ceil(32) * height.div_ceil(32);
    if all <= PATCHES_MAX {
        return all;
    }
    // Shrunk to the most patches, then a little more, until a whole number of them fits one side.
    let (width, height) = (width as f64, height as f64);
    let shrink = (1024.0 * PATCHES_MAX as f64 / (width * height)).sqrt();
    let (across, down) = (width * shrink / 32.0, height * shrink / 32.0);
    let fit = (across.floor() / across).min(down.floor() / down);
    let shrunk = (across * fit).ceil() * (down * fit).ceil();
    (shrunk as u64).clamp(1, PATCHES_MAX)
}

/// The size in pixels of an image in a `data:` URL, from its first bytes: PNG, JPEG, GIF. `None` for any other.
pub(super) fn size_of_data_url(url: &str) -> Option<(u32, u32)> {
    let (head, data) = url.strip_prefix("data:")?.split_once(',')?;
    let image = head.ends_with(";base64").then_some(Base64(data.as_bytes()))?;
    let size = png_size(image).or_else(|| jpeg_size(image)).or_else(|| gif_size(image))?;
    (size.0 > 0 && size.1 > 0).then_some(size)
}

fn png_size(image: Base64) -> Option<(u32, u32)> {
    (image.take::<8>(0)? == *b"\x89PNG\r\n\x1a\n").then_some(())?;
    Some((u32::from_be_bytes(image.take(16)?), u32::from_be_bytes(image.take(20)?)))
}

fn gif_size(image: Base64) -> Option<(u32, u32)> {
    (image.take::<4>(0)? == *b"GIF8").then_some(())?;
    Some((u16::from_le_bytes(image.take(6)?).into(), u16::from_le_bytes(image.take(8)?).into()))
}

/// Segments of a JPEG that are skipped to find its frame: cameras write about ten, a profile in parts some dozens.
const JPEG_SEGMENTS_MAX: usize = 256;

fn jpeg_size(image: Base64) -> Option<(u32, u32)> {
    (image.take::<2>(0)? == [0xff, 0xd8]).then_some(())?;
    let mut at = 2;
    for _ in 0..JPEG_SEGMENTS_MAX {
        let [marker, kind] = image.take::<2>(at)?;
        match kind {
            _ if marker != 0xff => return None,
            // A fill byte.
            0xff => at += 1,
            0xc0..=0xcf if !matches!(kind, 0xc4 | 0xc8 | 0xcc) => {
                let [height, width] = [image.take(at + 5)?, image.take(at + 7)?].map(u16::from_be_bytes);
                return Some((width.into(), height.into()));
            }
            _ => at += 2 + usize::from(u16::from_be_bytes(image.take(at + 2)?)),
        }
    }
    None
}

/// Base64 text of which single bytes are read where they stand: a header is found without decoding the image.
#[derive(Clone, Copy)]
struct Base64<'a>(&'a [u8]);

impl Base64<'_> {
    fn take<const N: usize>(self, start: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = self.byte(start + index)?;
        }
        Some(bytes)
    }

    fn byte(self, index: usize) -> Option<u8> {
        let group = index / 3 * 4 + index % 3;
        let pair = u16::from(self.digit(group)?) << 6 | u16::from(self.digit(group + 1)?);
        Some((pair >> (4 - 2 * (index % 3))) as u8)
    }

    fn digit(self, index: usize) -> Option<u8> {
        Some(match *self.0.get(index)? {
            letter @ b'A'..=b'Z' => letter - b'A',
            letter @ b'a'..=b'z' => letter - b'a' + 26,
            digit @ b'0'..=b'9' => digit - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let groups = bytes.chunks(3).map(|group| {
            let number =
                group.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            (0..4).map(move |place| {
                if place > group.len() { '=' } else { char::from(DIGITS[(number >> (18 - 6 * place) & 63) as usize]) }
            })
        });
        groups.flatten().collect()
    }

    #[test]
    fn the_examples_of_the_vision_guide_come_out() {
        assert_eq!(USUAL.tokens(1024, 1024), 765);
        assert_eq!(USUAL.tokens(2048, 4096), 1105);
        assert_eq!(USUAL.low(), Some(85));
        assert_eq!(patches(1024, 1024), 1024);
        assert_eq!(patches(1800, 2400), 1452);
        assert_eq!(image_tokens_max("gpt-4o-2024-08-06"), 1445);
        assert_eq!(image_tokens_max("qwen-vl-max"), IMAGE_TOKENS_MAX);
        assert_eq!(IMAGE_TOKENS_MAX, 48_169);
    }

    #[test]
    fn the_size_of_a_data_image_is_read_from_its_head() {
        let png =
            [&b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"[..], &640_u32.to_be_bytes(), &480_u32.to_be_bytes(), &[8, 6]].concat();
        let gif = b"GIF89a\x80\x02\xe0\x01\xf7\0\0";
        let exif = [&[0xff, 0xe1, 0x10, 0x02][..], &[0xff; 0x1000]].concat();
        let frame = [0xff, 0xc2, 0, 17, 8, 1, 0xe0, 2, 0x80, 3];
        let jpeg = [&[0xff, 0xd8][..], &exif, &[0xff, 0xc4, 0, 4, 1, 2], &[0xff], &frame].concat();
        for (kind, image) in [("png", &png[..]), ("gif", gif), ("jpeg", &jpeg)] {
            let url = format!("data:image/{kind};base64,{}", base64(image));
            assert_eq!(size_of_data_url(&url), Some((640, 480)), "{kind}");
        }
        for url in [
            "",
            "https://example.org/a.png",
            "data:image/png;base64,",
            "data:image/png,rawrawraw",
            "data:image/jpeg;base64,/9j//////////",
        ] {
            assert_eq!(size_of_data_url(url), None, "{url}");
        }
    }

    proptest! {
        #[test]
        fn no_image_costs_more_than_the_maximum(width in 0..100_000_u32, height in 0..100_000_u32, row in 0..PRICES.len()) {
            let price = PRICES[row].1;
            prop_assert!(price.tokens(width, height) <= price.max());
            prop_assert!(price.tokens(width, height) >= price.low().unwrap_or(1));
            prop_assert!(price.max() <= IMAGE_TOKENS_MAX);
        }

        #[test]
        fn any_bytes_of_base64_are_read_where_they_stand(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let text = base64(&bytes);
            let read: Vec<u8> = (0..).map_while(|index| Base64(text.as_bytes()).byte(index)).collect();
            prop_assert_eq!(read, bytes);
        }

        #[test]
        fn no_data_url_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60), jpeg in any::<bool>()) {
            let head: &[u8] = if jpeg { &[0xff, 0xd8, 0xff] } else { b"" };
            size_of_data_url(&format!("data:image/jpeg;base64,{}", base64(&[head, &bytes].concat())));
        }
    }
}
