use super::*;
use crate::memory;

const OFFERED: u64 = VIRTIO_F_VERSION_1 | 0b101;

fn config() -> CommonConfig {
    CommonConfig::new(OFFERED, vec![256, 64], 3)
}

fn read(config: &CommonConfig, offset: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    config.read(offset, &mut bytes[..len]);
    u64::from_le_bytes(bytes)
}

fn accept(config: &mut CommonConfig, features: u64) {
    for select in [0u32, 1] {
        config.write(field::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
        let half = u32::try_from(half(features, select)).unwrap();
        config.write(field::DRIVER_FEATURE, &half.to_le_bytes());
    }
}

/// As far as FEATURES_OK, with the features offered.
fn negotiated() -> CommonConfig {
    let mut config = config();
    config.write(field::STATUS, &[3]);
    accept(&mut config, OFFERED);
    config.write(field::STATUS, &[3 | FEATURES_OK]);
    config
}

#[test]
fn features_are_read_by_halves() {
    let mut config = config();
    assert_eq!(read(&config, field::DEVICE_FEATURE, 4), 0b101);
    config.write(field::DEVICE_FEATURE_SELECT, &1u32.to_le_bytes());
    assert_eq!(read(&config, field::DEVICE_FEATURE, 4), 1);
    config.write(field::DEVICE_FEATURE_SELECT, &2u32.to_le_bytes());
    assert_eq!(read(&config, field::DEVICE_FEATURE, 4), 0);
}

#[test]
fn features_not_offered_are_refused() {
    for features in [OFFERED | 2, 0b101] {
        let mut config = config();
        accept(&mut config, features);
        config.write(field::STATUS, &[3 | FEATURES_OK]);
        assert_eq!(read(&config, field::STATUS, 1), 3);
        assert_eq!(config.write(field::STATUS, &[7]), Effect::None);
        assert!(!config.driver_ok());
    }
}

#[test]
fn driver_ok_activates_once_and_zero_resets() {
    let mut config = negotiated();
    assert_eq!(config.write(field::STATUS, &[0xf]), Effect::Activate);
    assert_eq!(config.write(field::STATUS, &[0xf]), Effect::None);
    assert_eq!(config.write(field::STATUS, &[1]), Effect::None);
    assert_eq!(
        read(&config, field::STATUS, 1),
        0xf,
        "no bit can be cleared"
    );
    assert_eq!(config.write(field::STATUS, &[0]), Effect::Reset);
    config.reset();
    assert_eq!(read(&config, field::STATUS, 1), 0);
    assert_eq!(config.features(), 0);
}

#[test]
fn features_are_fixed_by_features_ok() {
    let mut config = negotiated();
    accept(&mut config, 0);
    assert_eq!(config.features(), OFFERED);
}

#[test]
fn queue_fields_belong_to_the_selected_queue() {
    let mut config = negotiated();
    config.write(field::QUEUE_SELECT, &1u16.to_le_bytes());
    config.write(field::QUEUE_SIZE, &32u16.to_le_bytes());
    config.write(field::QUEUE_VECTOR, &2u16.to_le_bytes());
    config.write(field::QUEUE_DESC, &0x1000u32.to_le_bytes());
    config.write(field::QUEUE_DESC + 4, &1u32.to_le_bytes());
    config.write(field::QUEUE_DRIVER, &0x2_0000_3000u64.to_le_bytes());
    assert_eq!(read(&config, field::QUEUE_SIZE, 2), 32);
    assert_eq!(read(&config, field::QUEUE_NOTIFY_OFF, 2), 1);
    assert_eq!(read(&config, field::QUEUE_DESC, 8), 0x1_0000_1000);
    assert_eq!(read(&config, field::QUEUE_DRIVER + 4, 4), 2);
    config.write(field::QUEUE_SELECT, &0u16.to_le_bytes());
    assert_eq!(read(&config, field::QUEUE_SIZE, 2), 256);
    assert_eq!(read(&config, field::QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
    config.write(field::QUEUE_SELECT, &9u16.to_le_bytes());
    assert_eq!(read(&config, field::QUEUE_SIZE, 2), 0);
    config.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
}

#[test]
fn enabled_queue_is_fixed() {
    let mut config = negotiated();
    config.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
    config.write(field::QUEUE_SIZE, &1u16.to_le_bytes());
    config.write(field::QUEUE_DESC, &0x1000u32.to_le_bytes());
    config.write(field::QUEUE_ENABLE, &0u16.to_le_bytes());
    assert_eq!(read(&config, field::QUEUE_SIZE, 2), 256);
    assert_eq!(read(&config, field::QUEUE_DESC, 8), 0);
    assert_eq!(read(&config, field::QUEUE_ENABLE, 2), 1);
}

#[test]
fn vectors_that_do_not_exist_are_refused() {
    let mut config = config();
    config.write(field::CONFIG_VECTOR, &2u16.to_le_bytes());
    assert_eq!(read(&config, field::CONFIG_VECTOR, 2), 2);
    config.write(field::CONFIG_VECTOR, &3u16.to_le_bytes());
    assert_eq!(read(&config, field::CONFIG_VECTOR, 2), u64::from(NO_VECTOR));
}

#[test]
fn failed_device_is_not_activated() {
    let mut config = negotiated();
    config.set_needs_reset();
    assert_eq!(config.write(field::STATUS, &[0xf]), Effect::None);
    assert_eq!(read(&config, field::STATUS, 1), 0x4f);
}

#[test]
fn queues_outside_memory_or_misaligned_are_refused() {
    let memory = memory::allocate(32, false).unwrap();
    let queue = |size, addresses| QueueConfig {
        size,
        addresses,
        ..QueueConfig::new(256)
    };
    assert!(
        queue(256, [0x1000, 0x3000, 0x4000])
            .build(&memory, 0)
            .is_ok()
    );
    for (size, addresses) in [
        (256, [0x1000, 0x3000, 64 << 20]),
        (256, [!0xf, 0x3000, 0x4000]),
        (256, [0x1008, 0x3000, 0x4000]),
        (100, [0x1000, 0x3000, 0x4000]),
        (512, [0x1000, 0x3000, 0x4000]),
        (0, [0x1000, 0x3000, 0x4000]),
    ] {
        assert!(queue(size, addresses).build(&memory, 0).is_err());
    }
}
